"""What of the live objects a checkpoint holds: names, boxes, random generators; who writes and who reads which part."""
