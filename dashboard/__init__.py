"""The dashboard: Streamlit pages that talk to the API."""
