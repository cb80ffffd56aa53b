"""`uvicorn main:app`: the API and a run worker in one process, as the environment configures them."""

from plm_backend.serving import make_app
from plm_backend.startup import load_settings

app = make_app(load_settings())
