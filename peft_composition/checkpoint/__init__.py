"""Keeps: what is saved, shown and given to others: model cards, pushing to the Hub, plain LoRAs."""
