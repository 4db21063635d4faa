"""From unsafe responses to a preference dataset, and from models to a judged report; no training code in here."""
