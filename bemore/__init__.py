"""What bemore_voice.py stands on: leaves that can be read alone, and know nothing of the server."""
