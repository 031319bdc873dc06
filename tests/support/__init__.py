"""What several tests share: routings, expected results, programs, rank processes."""
