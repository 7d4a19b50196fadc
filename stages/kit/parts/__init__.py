"""What some methods share and others do not need."""
