// Cubins through the CUDA driver API, which is found when it is first needed: the library links
// neither libcuda nor libcudart, and loads on a machine without a GPU.
#pragma once
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>

#include "../kernels/call.h"

namespace refedge {

struct Cubin {
  int sm;
  unsigned char const* data;
};
// Those that the library was built with, ended by sm 0; cubins.inc is written by the build.
Cubin const* cubins();

class Driver {
 public:
  // Null, and `why` says what is missing, without a usable driver.
  static Driver* get(std::string& why) {
    static Driver driver;
    if (!driver.missing_.empty()) why = driver.missing_;
    return driver.missing_.empty() ? &driver : nullptr;
  }

  // A kernel for the current context's device, loaded once per context; null and why.
  void* kernel(std::string const& name, std::string& why) {
    void* context = nullptr;
    if (!ok(get_current_(&context), "cuCtxGetCurrent", why)) return nullptr;
    if (!context) {
      why = "no CUDA context is current";
      return nullptr;
    }
    // an address may be used again for a later context, an id (CUDA 12) is not
    unsigned long long id = reinterpret_cast<unsigned long long>(context);
    if (get_id_ && get_id_(context, &id) != 0) id = reinterpret_cast<unsigned long long>(context);
    std::lock_guard<std::mutex> const lock(mutex_);
    void*& module = modules_[id];
    if (!module && !load(&module, why)) return nullptr;
    void* function = nullptr;
    if (!ok(get_function_(&function, module, name.c_str()), name.c_str(), why)) return nullptr;
    return function;
  }

  bool launch(void* function, Launch const& l, Call& call, void* stream, std::string& why) {
    void* arguments[] = {&call};
    return ok(launch_(function, l.grid[0], l.grid[1], l.grid[2], kThreads, 1, 1, l.shared, stream,
                      arguments, nullptr),
              l.kernel, why);
  }

 private:
  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      missing_ = "libcuda.so.1 cannot be loaded: no NVIDIA driver";
      return;
    }
    auto find = [&](auto& function, char const* name, bool needed = true) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      if (!function && needed) missing_ = std::string("the driver has no ") + name;
    };
    find(get_current_, "cuCtxGetCurrent");
    find(get_id_, "cuCtxGetId", false);
    find(get_device_, "cuCtxGetDevice");
    find(get_attribute_, "cuDeviceGetAttribute");
    find(load_, "cuModuleLoadData");
    find(get_function_, "cuModuleGetFunction");
    find(launch_, "cuLaunchKernel");
    find(name_error_, "cuGetErrorName");
  }

  bool ok(int result, char const* what, std::string& why) {
    if (result == 0) return true;
    char const* name = nullptr;
    name_error_(result, &name);
    why = std::string(what) + ": " + (name ? name : std::to_string(result).c_str());
    return false;
  }

  // The cubin of the device's architecture, or of an older one of the same generation.
  bool load(void** module, std::string& why) {
    int device = 0, major = 0, minor = 0;
    if (!ok(get_device_(&device), "cuCtxGetDevice", why) ||
        !ok(get_attribute_(&major, 75, device), "cuDeviceGetAttribute", why) ||
        !ok(get_attribute_(&minor, 76, device), "cuDeviceGetAttribute", why))
      return false;
    Cubin const* best = nullptr;
    for (Cubin const* c = cubins(); c->sm; ++c)
      if (c->sm / 10 == major && c->sm % 10 <= minor && (!best || c->sm > best->sm)) best = c;
    if (!best) {
      why = "no kernels for compute capability " + std::to_string(major) + "." +
            std::to_string(minor);
      return false;
    }
    return ok(load_(module, best->data), "cuModuleLoadData", why);
  }

  std::string missing_;
  std::mutex mutex_;
  std::map<unsigned long long, void*> modules_;
  int (*get_current_)(void**) = nullptr;
  int (*get_id_)(void*, unsigned long long*) = nullptr;
  int (*get_device_)(int*) = nullptr;
  int (*get_attribute_)(int*, int, int) = nullptr;
  int (*load_)(void**, void const*) = nullptr;
  int (*get_function_)(void**, void*, char const*) = nullptr;
  int (*launch_)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                 void**, void**) = nullptr;
  int (*name_error_)(int, char const**) = nullptr;
};

}  // namespace refedge
