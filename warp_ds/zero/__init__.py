"""How the method is spread over ZeRO-3 ranks: partitions, the masked step, collectives, loading and saving."""
