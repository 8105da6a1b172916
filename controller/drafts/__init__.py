"""The text that engines draft from: kept, exchanged between workers, loaded from files."""
