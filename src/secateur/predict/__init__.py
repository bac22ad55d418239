"""What a run will come to, told before anything heavy: sizes, memory, disk and time."""
