"""Images and videos as clients send them: sizes from headers, fetching, resizing."""
