"""Pictures and videos: reading, resizing, writing."""
