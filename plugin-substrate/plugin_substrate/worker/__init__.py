"""What runs in a plugin's own processes. Standard library only, and the host starts it from its own files by path."""
