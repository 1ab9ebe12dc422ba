"""Parts of the page of a job, one a tab."""
