"""The account of Hugging Face Transformers: one process, one request at a time, whole layers."""
