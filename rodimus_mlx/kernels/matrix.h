// A lane's share of a 16 x 16 factor, of a 16 x 8 factor, and of their 16 x 8 product. matrix_cuda.h and matrix_metal.h
// say which numbers those are.

struct Left {
  float x[8];
};
struct Right {
  float x[4];
};
struct Sum {
  float x[4];
};
