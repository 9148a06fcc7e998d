"""What a request may hold: fields, images, videos, grammars. No input or output."""
