"""What lies on disk: which files and folders are ours, and how they are replaced and removed."""
