"""What runs an exported model: sessions over a KV cache, on LiteRT or on the simulator."""
