"""Documents of turbofit, made again and compared byte for byte. See README.md."""
