"""A web page on which a trained model continues videos and images: an HTTP server, a queue, and the page itself."""
