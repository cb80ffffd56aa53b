"""Turns one audio or video format into another: ffmpeg."""
