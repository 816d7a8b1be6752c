"""The operators in other people's trainers. Each module imports its library when it is called, not before."""
