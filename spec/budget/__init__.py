"""Draft budgets: step costs, acceptance rates, lengths, and how much to draft."""
