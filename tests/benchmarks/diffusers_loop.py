"""The loop of diffusers' examples/text_to_image/train_text_to_image.py as a process: what train_throughput.py measures
train/train_ldm.py against.

    python tests/benchmarks/diffusers_loop.py --config LDM.YAML --stages FOLDER --output FOLDER [key=value …]

Images and captions are encoded in every step and all is computed in fp32, as that script does unless told otherwise;
the weights are averaged (`--use_ema`), as those of train_ldm.py are. It is spared the decoding of image files, and its
U-Net gets image embeddings, which that script does not know. Writes a line a step to OUTPUT/metrics.jsonl.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModelWithProjection

from ldm import configuration
from ldm.config import LdmConfig
from ldm.errors import exit_code_of
from ldm.training.unet import build_unet
from pipelines.arguments import ArgumentParser


def main() -> None:
    parser = ArgumentParser(description="The training loop of diffusers' text-to-image example.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--stages", type=Path, required=True, help="folder of the runs autoencoder and clip")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    config = configuration.load(LdmConfig, arguments.config, arguments.overrides)
    torch.manual_seed(config.seed)

    vae = AutoencoderKL.from_pretrained(arguments.stages / "autoencoder" / "model" / "vae").requires_grad_(False)
    text_encoder = CLIPTextModelWithProjection.from_pretrained(arguments.stages / "clip" / "model" / "text_encoder")
    text_encoder.requires_grad_(False)
    text, side = text_encoder.config, vae.config.sample_size
    latent_side = side // 2 ** (len(vae.config.block_out_channels) - 1)
    latent_shape = (vae.config.latent_channels, latent_side, latent_side)
    unet = build_unet(config, latent_shape, text.hidden_size, text.projection_dim)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr_scheduler = get_scheduler("constant", optimizer)
    noise_scheduler = DDPMScheduler(beta_schedule=config.beta_schedule, prediction_type=config.prediction_type)
    batch_size = config.training.batch_size
    pixel_values = torch.rand(batch_size, 3, side, side) * 2 - 1
    input_ids = torch.randint(text.vocab_size, (batch_size, text.max_position_embeddings))
    image_embeds = torch.randn(batch_size, 2 * text.projection_dim)

    arguments.output.mkdir(parents=True)
    with (arguments.output / "metrics.jsonl").open("w") as log:
        for step in range(config.training.max_steps):
            latents = vae.encode(pixel_values).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
            noisy_latents = noise_scheduler.add_noise(latents, noise, t)
            encoder_hidden_states = text_encoder(input_ids).last_hidden_state
            target = noise_scheduler.get_velocity(latents, noise, t)
            prediction = unet(noisy_latents, t, encoder_hidden_states, class_labels=image_embeds, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), target.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            log.write(json.dumps({"step": step + 1, "loss": loss.item()}) + "\n")
            log.flush()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
