"""Turn a damage table and limits into configurations, one method a file."""
