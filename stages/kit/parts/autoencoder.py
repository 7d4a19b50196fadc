"""MAE's encoder, decoder, loss and pictures (arXiv 2111.06377), for methods that differ in masks or
add a loss.

The encoder gets the visible patches, the decoder what it makes of them and one learnt token in the
place of every other patch; it predicts the pixels of all, and those of hidden ones have a loss.
`config` has `norm_pix` and is a checks.Decoder. methods/mae.py names the departures.
"""

from __future__ import annotations

from torch import Tensor, nn

from stages.kit.nets import encoders
from stages.kit.nets.decoder import Decoder
from stages.kit.nets.patches import normalise_patches, patch_statistics, patchify, unpatchify
from stages.kit.nets.pictures import paint


class Autoencoder(nn.Module):
    """The encoder, which is exported, and the decoder, which only pretraining needs."""

    def __init__(self, config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.patches = spec.grid**2  # N
        self.encoder = encoders.create(spec, "sincos")
        self.fusion = encoders.fusion(self.encoder)  # of a ConvViT; a ViT has none
        width, prefix = self.encoder.embed_dim, self.encoder.num_prefix_tokens
        self.decoder = Decoder.of(config, width, 3 * spec.patch**2, spec.grid, prefix=prefix)

    def encode(self, images: Tensor, ids_keep: Tensor) -> dict[str, Tensor]:
        """Normalised images -> what the encoder has of the patches ids_keep (B,n), the only ones
        that it sees, as kit/nets/encoders.py gives it: "tokens" (B,P+n,D) and others.
        """
        return encoders.visible(self.encoder, images, ids_keep, fusion=self.fusion)

    def decode(self, encoded: dict[str, Tensor], ids_restore: Tensor) -> Tensor:
        """What `encode` gives -> pixels of every patch (B,N,3*patch^2)."""
        return self.decoder(encoded["tokens"], ids_restore)

    def reconstruct(self, images: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> Tensor:
        """Normalised images -> pixels of every patch (B,N,3*patch^2), from the kept ones alone."""
        return self.decode(self.encode(images, ids_keep), ids_restore)

    def error(self, predicted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of predictions (B,N,3*patch^2) at patches where mask (B,N) is 1."""
        error = (predicted.float() - self.target(images)).square().mean(dim=-1)  # (B,N)
        return (error * mask).sum() / mask.sum()

    def target(self, images: Tensor) -> Tensor:
        """Normalised images -> their patches (B,N,3*patch^2), float32, normalised if norm_pix."""
        patches = patchify(images.float(), self.spec.patch)
        return normalise_patches(patches) if self.config.norm_pix else patches

    def filled(self, pixels: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] with predictions in the place of their hidden patches.

        Visible patches are the image's, since nothing trains their prediction. With norm_pix the
        predicted patches get the mean and deviation of the TRUE patch, which the model does not
        know: only their structure is its own.
        """
        predicted, patch = predicted.float(), self.spec.patch
        if self.config.norm_pix:
            images = self.spec.normalise(pixels)
            mean, deviation = patch_statistics(patchify(images, patch))
            predicted = predicted * deviation + mean
        return paint(pixels, mask, self.spec.denormalise(unpatchify(predicted, patch)))
