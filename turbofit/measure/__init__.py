"""Measures by trying: calibrates and tunes plans, sends loads to servers, reads GPUs' memory."""
