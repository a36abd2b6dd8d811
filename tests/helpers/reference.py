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


def oracle(factors, x, grad, p):
    """Output and every gradient of z = x W^T + b for W made of `factors` = (L, C, D, b or None), in their dtype."""
    leaves = [None if f is None else f.detach().clone().requires_grad_() for f in (*factors, x)]
    *params, x = leaves
    z = torch.nn.functional.linear(x, dense_weight(*params[:3], p), params[3])
    z.backward(grad)
    return z.detach(), [None if leaf is None else leaf.grad for leaf in leaves]
