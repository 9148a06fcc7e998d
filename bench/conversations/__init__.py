"""Conversations about pictures: the first token by turn, on pretend GPUs with a clock."""
