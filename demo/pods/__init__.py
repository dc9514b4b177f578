"""`make demo-pods`: identity by pod, in real containers, and who tries to pass for one."""
