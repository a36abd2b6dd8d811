"""The dense oracle: what a phantom layer computes, written as one dense matrix, differentiated by autograd."""

import torch


def dense_weight(local, compressor, decompressor, p):
    """W_ii = L_i and W_ij = D_ij C_j, from the global factors, differentiable."""
    m_out, k = local.shape[0] // p, compressor.shape[0] // p
    rows = []
    for i in range(p):
        row = []
        for j in range(p):
            if i == j:
                row.append(local[i * m_out : (i + 1) * m_out])
            else:
                column = j if j < i else j - 1  # D has no block for j = i
                d_ij = decompressor[i * m_out : (i + 1) * m_out, column * k : (column + 1) * k]
                row.append(d_ij @ compressor[j * k : (j + 1) * k])
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows, dim=0)


def by_part(rows, p, parts):
    """Rows [out, *], block by block with a block's share of every part, in the order of the parts."""
    return torch.cat([block.chunk(parts)[part] for part in range(parts) for block in rows.chunk(p)])


def oracle(factors, x, grad, p):
    """Output and every gradient of z = x W^T + b for W made of `factors` = (L, C, D, b or None), in their dtype."""
    leaves = [None if f is None else f.detach().clone().requires_grad_() for f in (*factors, x)]
    *params, x = leaves
    z = torch.nn.functional.linear(x, dense_weight(*params[:3], p), params[3])
    z.backward(grad)
    return z.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def off_diagonal(compressor, decompressor, p, mixing):
    """The dense matrix [out, in] of D_ij C_j, or of D_ij C_ij in private mixing, with zero blocks for i = j."""
    m_out, k, m_in = decompressor.shape[0] // p, decompressor.shape[1] // (p - 1), compressor.shape[1]
    rows = []
    for i in range(p):
        row = []
        for j in range(p):
            if i == j:
                row.append(decompressor.new_zeros(m_out, m_in))
                continue
            d_ij = decompressor[i * m_out : (i + 1) * m_out][:, [n for n in range(p) if n != i].index(j) * k :][:, :k]
            if mixing == "private":
                c_j = compressor[j * (p - 1) * k : (j + 1) * (p - 1) * k]
                c = c_j[[n for n in range(p) if n != j].index(i) * k :][:k]
            else:
                c = compressor[j * k : (j + 1) * k]
            row.append(d_ij @ c)
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows, dim=0)


def chain_oracle(layers, activations, x, mixing, latents, p):
    """What a chain computes, from the global factors of each layer (a dict by parameter name), by dense matrices.

    The first layer reads latents of its own input; the others of theirs, of that of the layer before, or of both.
    """
    before = None
    for n, (layer, activation) in enumerate(zip(layers, activations, strict=True)):
        z = x @ torch.block_diag(*layer["weight"].chunk(p)).mT
        own = off_diagonal(layer["compressor_weight"], layer["decompressor_weight"], p, mixing)
        z = z + (before if n and latents == "previous" else x) @ own.mT
        if n and latents == "both":
            made = layers[n - 1]["compressor_weight"]
            z = z + before @ off_diagonal(made, layer["decompressor_before_weight"], p, mixing).mT
        if "bias" in layer:
            z = z + layer["bias"]
        before, x = x, activation(z)
    return x
