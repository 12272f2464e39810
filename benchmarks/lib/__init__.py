"""What measurements share: command lines, provenance, clocks, memory, traffic between ranks, published configurations."""
