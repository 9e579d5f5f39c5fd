"""What happens where the rows are. Knows no server and no transport."""
