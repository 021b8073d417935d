"""The page: one prompt and one seed, the base on the left and the adapted model on the right."""

from __future__ import annotations

import os
from pathlib import Path

# Nothing leaves this machine: read when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from PIL import Image

from lora_dpo.errors import LoraDpoError

from .runs import BASE_ONLY, Studio, finished_runs, result_of

STYLE = ".picture img { image-rendering: pixelated; }"


def build(runs: list[str]) -> gr.Blocks:
    """The page for these run directories, the first of them chosen; the tiny world's base is always offered."""
    studio = Studio()
    choices = [*runs, BASE_ONLY]
    first = result_of(choices[0])

    def defaults(run: str) -> tuple[str, int, float]:
        try:
            result = result_of(run)
        except LoraDpoError as error:
            raise gr.Error(str(error)) from error
        return result["example_prompt"], result["sampling"]["steps"], result["sampling"]["guidance"]

    def generate(
        run: str, prompt: str, seed: float, steps: int, guidance: float, strength: float
    ) -> tuple[Image.Image, Image.Image | None]:
        try:
            return studio.pictures(run, prompt, int(seed), int(steps), float(guidance), float(strength))
        except LoraDpoError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="lora-dpo", analytics_enabled=False) as page:
        gr.Markdown("# Base and adapted, from the same noise")
        run = gr.Dropdown(choices, value=choices[0], label="Run")
        prompt = gr.Textbox(first["example_prompt"], label="Prompt", lines=2)
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            steps = gr.Slider(1, 100, value=first["sampling"]["steps"], step=1, label="Steps")
            guidance = gr.Slider(1, 15, value=first["sampling"]["guidance"], step=0.5, label="Guidance")
            strength = gr.Slider(0, 2, value=1, step=0.05, label="Adapter strength (1: as trained)")
        go = gr.Button("Generate", variant="primary")
        with gr.Row():
            base = gr.Image(label="Base", format="png", elem_classes="picture", interactive=False)
            adapted = gr.Image(label="Adapted", format="png", elem_classes="picture", interactive=False)
        inputs = [run, prompt, seed, steps, guidance, strength]
        gr.on([go.click, prompt.submit], generate, inputs, [base, adapted], api_name="generate")
        run.change(defaults, run, [prompt, steps, guidance], api_name="defaults")
    return page


def launch(run: Path | None, host: str, port: int | None) -> None:
    """Serves the page until Ctrl-C; `run` None offers the finished runs below `runs/`."""
    page = build([str(run)] if run is not None else finished_runs(Path("runs")))
    # System fonts: the default theme fetches its own from the network.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.queue(default_concurrency_limit=1).launch(
        server_name=host, server_port=port, share=False, footer_links=[], theme=theme, css=STYLE
    )
