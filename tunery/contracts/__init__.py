"""What programs say to each other: files and lines, no libraries beyond pydantic."""
