"""From raw shards to packed rows, in an exact order. Read: sources, formats, clean, packing, order, index, pipeline."""
