"""What is learned: one small file each."""
