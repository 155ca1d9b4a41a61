"""What decoder layers are made of; each block reads its own weights."""
