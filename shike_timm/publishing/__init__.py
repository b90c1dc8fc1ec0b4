"""What leaves this package: exports, model cards, the Hub."""
