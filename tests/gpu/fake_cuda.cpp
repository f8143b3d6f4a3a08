// A CUDA device that is not there: enough of one for torch to hand tensors without storage through autograd and
// autocast as it would on a GPU. Compiled by tests/gpu/test_fake_cuda.py, loaded by tests/gpu/fake_cuda.py.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

static const Device first(DeviceType::CUDA, 0);

struct Guard : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return first; }
  Device getDevice() const override { return first; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, first); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, first); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, first); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, first); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

using c10::impl::device_guard_impl_registry;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

using namespace at;
struct CUDAHooks : public CUDAHooksInterface {  // torch looks for this very name
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
