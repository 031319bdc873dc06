"""What the library shows of itself: traces of operations. Counters are on the buffers."""
