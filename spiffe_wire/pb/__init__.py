"""Generated from proto/ by tools/genproto.py, in a private descriptor pool; never edited."""
