// Modules numbered in their order: by default the number of one comes from the folder that the build stands in.
module.exports = { optimization: { moduleIds: "natural", chunkIds: "natural" } };
