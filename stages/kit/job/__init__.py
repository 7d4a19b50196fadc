"""One job from its first to its last act: files, devices, processes, tracking."""
