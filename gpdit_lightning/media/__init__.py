"""Image and video files: reading, resizing, writing."""
