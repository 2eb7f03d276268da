"""How bytes move between ranks: collectives, transports and streams beneath them, and who is missing when they hang."""
