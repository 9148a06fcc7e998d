"""The conversion of documents to text, Markdown and bars."""
