"""What is on disk, on both sides: journal, dirty index, images, undo."""
