"""What the commands convert, verify, export, inspect and quantize do; their flags are read before this is loaded."""
