"""From raw shards to packed sequences, in an exact order. Start with sources, examples, packing, order, index, loader."""
