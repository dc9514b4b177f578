"""`make demo`: a trust domain on this machine, told as a story in a screen and a half."""
