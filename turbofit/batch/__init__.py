"""Files and folders of requests, sent to a server until each has its line in an output file."""
